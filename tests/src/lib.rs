//! Image and guest tests; see `tests/`.
