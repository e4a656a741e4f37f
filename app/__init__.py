if __name__ != "headscope.app":
    raise ImportError("import headscope.app, not app: the folder is mapped to that name by the installed package")
