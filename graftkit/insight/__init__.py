"""What the features of a model tell of rows: wrong labels, fit, reasons, confidence, what to label next."""
