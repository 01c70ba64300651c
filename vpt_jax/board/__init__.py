# SPDX-License-Identifier: Apache-2.0
"""What a leaderboard shows: lines, averages, published rows, tables, page, figures."""
