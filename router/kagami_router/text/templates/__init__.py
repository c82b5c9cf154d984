"""For chat_template.py: Jinja and its limits, a template's files, the content it reads."""
