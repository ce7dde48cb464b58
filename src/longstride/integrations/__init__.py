"""Longstride inside other libraries' models: one package for each, loaded only when asked for."""
