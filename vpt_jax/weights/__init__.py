# SPDX-License-Identifier: Apache-2.0
"""Pretrained weights in; released prompts in and out."""
