"""The registry as a service: its books, its public log on disk, and what it answers over HTTP."""
