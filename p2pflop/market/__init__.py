"""The market as data and rules: sheets, book, ranking, fills, receipts, ledger. Pure."""
