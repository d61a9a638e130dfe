"""The census: what normwise makes of published architectures, against expectations that were written by hand from their code.

`axes` reads how an expectation states a tensor's axes, `family` holds one architecture and what is expected of it, `seen` asks the library,
`oracle` asks the forward pass; the other modules are tables of families. `tests/test_census.py` compares, `docs/census.py` writes the page.
"""
