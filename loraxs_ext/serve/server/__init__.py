"""`loraxs serve`: OpenAI's API over continuous batching, the routes of an administrator, and a page to look at."""
