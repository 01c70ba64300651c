# SPDX-License-Identifier: Apache-2.0
"""The paper's claims, put to the test; `study.py` says what a study is."""
