"""Turn values into console output, model cards, tables and report pages. No torch here."""
