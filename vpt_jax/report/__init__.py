# SPDX-License-Identifier: Apache-2.0
"""Pages and tables of a run and of a benchmark."""
