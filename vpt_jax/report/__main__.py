# SPDX-License-Identifier: Apache-2.0
"""`python -m vpt_jax.report DIR` draws a run's or a benchmark's report once more."""

from vpt_jax.report.document import main

main()
