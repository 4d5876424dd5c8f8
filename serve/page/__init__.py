"""The web page: talk, chat and status in a browser, from files that come with the package."""
