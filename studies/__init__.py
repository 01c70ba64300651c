# SPDX-License-Identifier: Apache-2.0
"""Tests of the paper's claims, beside the package: `python -m studies.all`."""
