"""A server of long documents: prefilled once, asked often, in the shapes of OpenAI's API, with a page to ask in."""
