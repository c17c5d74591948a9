"""The shared contract: CRD types, run file, documents, failure table and planner.

Pure Python. Nothing here does I/O or imports torch, kopf or the Kubernetes client, so that the
operator, the trainer, the documentation and the tests can all rest on it.
"""
