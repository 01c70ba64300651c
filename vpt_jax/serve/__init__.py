# SPDX-License-Identifier: Apache-2.0
"""What answers after training: a classifier, its export, and sharing."""
