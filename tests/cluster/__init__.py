"""Starts and stops the real Kubernetes, S3 server and images that the tests and the demo run on."""
