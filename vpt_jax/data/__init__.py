# SPDX-License-Identifier: Apache-2.0
"""Data sets: small tasks, drawn pictures, what happens to pictures on the device."""
