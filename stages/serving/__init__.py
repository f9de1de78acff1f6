"""Servers and their clients: the environment with vLLM, its launcher and plugin, scoring and the load generator."""
