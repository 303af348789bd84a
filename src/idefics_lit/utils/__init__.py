"""Files, ranks and copies: small things that several packages use."""
