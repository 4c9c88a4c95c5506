"""Structured output: constraints on answers, and which tokens they allow."""
