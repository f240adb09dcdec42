"""Adapters inside other libraries' models; nothing here is imported until asked for."""
