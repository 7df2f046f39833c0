from xtf.plan import main

if __name__ == "__main__":  # processes of --search import this too
    main()
