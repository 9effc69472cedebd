"""What a release costs, as values and pure steps: mechanisms, accountants, noise from given keys, ledger rules."""
