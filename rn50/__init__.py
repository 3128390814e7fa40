"""What the rn50 scripts, tools and tests share. Importing it runs nothing."""
