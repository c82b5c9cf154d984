"""What stands behind chat_template.py: Jinja, its limits, a template's files and what it reads."""
