"""The generated parts of the documentation: tables of the operators' pages, and pictures."""
