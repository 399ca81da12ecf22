"""The configuration of a command: schema, composition, and errors that say what to type instead. No torch here."""
