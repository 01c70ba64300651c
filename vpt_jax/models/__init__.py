# SPDX-License-Identifier: Apache-2.0
"""Linen backbones that take prompts as an argument."""
