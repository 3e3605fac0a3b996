"""The command line of qchain."""
