"""The home of gRPC, which reads its settings when it is imported: they are made here, and all take it from here."""

import os
import sys

# TLS 1.3 only. gRPC has no setting for the lowest version, but this one names the suites of TLS 1.2, and the one named
# here needs an RSA certificate: with ours, on elliptic curves, TLS 1.2 has no suite left. It leaves those of 1.3 alone.
_SUITES = ("GRPC_SSL_CIPHER_SUITES", "ECDHE-RSA-AES256-GCM-SHA384")

TLS_13_ONLY = "grpc" not in sys.modules or os.environ.get(_SUITES[0]) == _SUITES[1]
"""Whether gRPC was told in time; `tls` makes no credentials otherwise."""

os.environ[_SUITES[0]] = _SUITES[1]
os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what fails, our own messages say

import grpc  # noqa: E402

__all__ = ["TLS_13_ONLY", "grpc"]
