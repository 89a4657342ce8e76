"""Start the campaign. This file stays short, because every forked process imports it again."""

if __name__ == "__main__":
    from tests.campaign.program import main

    main()
