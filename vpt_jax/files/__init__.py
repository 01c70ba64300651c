# SPDX-License-Identifier: Apache-2.0
"""What is written and survives, what is said, and the terminal."""
