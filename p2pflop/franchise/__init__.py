"""The registry's records and rules, pure: what it signs, its public log, and who is attested."""
