"""Every page, in both themes and on a phone: nothing serious for axe, nothing from elsewhere, no error, no sideways scroll."""
