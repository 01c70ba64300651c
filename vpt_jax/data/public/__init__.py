# SPDX-License-Identifier: Apache-2.0
"""Public data sets: VTAB-1k and FGVC, and readers of what was prepared."""
