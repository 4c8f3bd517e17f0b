"""Adapters to the libraries that run the models, one module each."""
