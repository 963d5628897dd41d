"""From results to pages, tables and plots."""
