"""Secure aggregation: only the sum of a cohort's updates can be read, even by a coordinator that lies.

Two machines without I/O, `site` and `server`, and what they are made of. The protocol is Bonawitz et al. 2017
(ePrint 2017/281) against a malicious server; `docs/explanation/secure-aggregation.md` says what it promises.
"""
