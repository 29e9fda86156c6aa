"""The transformer: specification, families, layers, attention, cache, sampling, tokenizer.

Importing this package imports no torch: the front process reads configuration,
tokenizer and chat template from here.
"""
