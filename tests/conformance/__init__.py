"""Every use of optax, on every transformation of ours."""
