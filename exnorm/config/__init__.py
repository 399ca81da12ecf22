"""The configuration of a command: schema, composition and error messages. Imports no torch."""
