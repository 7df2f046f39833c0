from xtf.plan import main

main()
