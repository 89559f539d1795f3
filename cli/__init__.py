"""The command line of tadperf: reads options, calls the library, prints."""
