from effattn.export._frozen import freeze
