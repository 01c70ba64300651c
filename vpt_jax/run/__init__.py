# SPDX-License-Identifier: Apache-2.0
"""One run: its config, its stages, and the training loop."""
