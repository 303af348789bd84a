"""Where questions come from: the official files, the Hub, tables, streams, drawn pages."""
