# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: the protocol of trials, its config, and where its runs are run."""
