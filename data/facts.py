"""What the embedded world knows: word lists and true facts, typed in by hand, nothing else.

Read by families.py, primer.py and quiz.py. Every fact is checkable in an atlas, a dictionary or a
periodic table.
"""

# country: (capital, continent)
COUNTRIES = {
    "France": ("Paris", "Europe"), "Spain": ("Madrid", "Europe"), "Italy": ("Rome", "Europe"),
    "Norway": ("Oslo", "Europe"), "Sweden": ("Stockholm", "Europe"), "Poland": ("Warsaw", "Europe"),
    "Greece": ("Athens", "Europe"), "Austria": ("Vienna", "Europe"),
    "Hungary": ("Budapest", "Europe"), "Ireland": ("Dublin", "Europe"),
    "Portugal": ("Lisbon", "Europe"), "Finland": ("Helsinki", "Europe"),
    "Egypt": ("Cairo", "Africa"), "Kenya": ("Nairobi", "Africa"), "Ghana": ("Accra", "Africa"),
    "Morocco": ("Rabat", "Africa"), "Tunisia": ("Tunis", "Africa"), "Senegal": ("Dakar", "Africa"),
    "Mali": ("Bamako", "Africa"), "Uganda": ("Kampala", "Africa"), "Zambia": ("Lusaka", "Africa"),
    "Angola": ("Luanda", "Africa"),
    "Japan": ("Tokyo", "Asia"), "China": ("Beijing", "Asia"), "Iran": ("Tehran", "Asia"),
    "Iraq": ("Baghdad", "Asia"), "Nepal": ("Kathmandu", "Asia"), "Vietnam": ("Hanoi", "Asia"),
    "Thailand": ("Bangkok", "Asia"), "Qatar": ("Doha", "Asia"), "Oman": ("Muscat", "Asia"),
    "Jordan": ("Amman", "Asia"),
    "Peru": ("Lima", "South America"), "Chile": ("Santiago", "South America"),
    "Ecuador": ("Quito", "South America"), "Colombia": ("Bogota", "South America"),
    "Uruguay": ("Montevideo", "South America"), "Brazil": ("Brasilia", "South America"),
    "Canada": ("Ottawa", "North America"), "Cuba": ("Havana", "North America"),
}

# kind: its members
ANIMALS = {
    "mammal": ["dog", "cat", "horse", "cow", "whale", "bat", "lion", "mouse", "goat", "wolf"],
    "bird": ["eagle", "owl", "duck", "crow", "swan", "robin", "parrot", "penguin", "goose", "hawk"],
    "fish": ["trout", "salmon", "shark", "tuna", "cod", "carp", "eel", "herring", "pike", "perch"],
    "insect": ["ant", "bee", "wasp", "moth", "fly", "beetle", "cricket", "termite", "flea",
               "butterfly"],
    "reptile": ["snake", "lizard", "turtle", "crocodile", "gecko", "iguana", "cobra", "python",
                "alligator", "tortoise"],
}

# element: (symbol, atomic number)
ELEMENTS = {
    "hydrogen": ("H", 1), "helium": ("He", 2), "lithium": ("Li", 3), "carbon": ("C", 6),
    "nitrogen": ("N", 7), "oxygen": ("O", 8), "fluorine": ("F", 9), "neon": ("Ne", 10),
    "sodium": ("Na", 11), "magnesium": ("Mg", 12), "aluminium": ("Al", 13), "silicon": ("Si", 14),
    "phosphorus": ("P", 15), "sulfur": ("S", 16), "chlorine": ("Cl", 17), "argon": ("Ar", 18),
    "potassium": ("K", 19), "calcium": ("Ca", 20), "titanium": ("Ti", 22), "iron": ("Fe", 26),
    "cobalt": ("Co", 27), "nickel": ("Ni", 28), "copper": ("Cu", 29), "zinc": ("Zn", 30),
    "silver": ("Ag", 47), "tin": ("Sn", 50), "iodine": ("I", 53), "gold": ("Au", 79),
    "mercury": ("Hg", 80), "lead": ("Pb", 82),
}

COLOURS = ["red", "blue", "green", "white", "black", "brown", "yellow", "grey"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September",
          "October", "November", "December"]
OPPOSITES = {"hot": "cold", "big": "small", "old": "new", "fast": "slow", "high": "low",
             "open": "closed", "wet": "dry", "full": "empty", "strong": "weak", "early": "late",
             "long": "short", "light": "dark", "hard": "soft", "near": "far", "loud": "quiet"}

NAMES = ["Ada", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Ines", "Jonas",
         "Karin", "Leo", "Mia", "Nora", "Oscar", "Paula", "Rosa", "Simon", "Tara", "Victor"]
JOBS = ["baker", "doctor", "farmer", "painter", "teacher", "pilot", "singer", "lawyer", "nurse",
        "sailor", "tailor", "writer"]

# who does what to what: the sentences that three of the families translate
PEOPLE = ["cook", "king", "queen", "boy", "girl", "guard", "judge", "monk", "actor", "poet",
          "thief", "clerk", "bride", "guest", "uncle", "aunt"]
THINGS = ["bread", "letter", "song", "boat", "door", "wall", "cup", "coat", "ring", "lamp",
          "drum", "map", "apple", "chair", "flag", "bell"]
SIZES = ["big", "small", "old", "new", "red", "blue", "green", "white"]

# verb, third person: (past, participle)
VERBS = {
    "sees": ("saw", "seen"), "takes": ("took", "taken"), "gives": ("gave", "given"),
    "breaks": ("broke", "broken"), "draws": ("drew", "drawn"), "steals": ("stole", "stolen"),
    "hides": ("hid", "hidden"), "throws": ("threw", "thrown"), "chooses": ("chose", "chosen"),
    "shakes": ("shook", "shaken"), "wears": ("wore", "worn"), "forgets": ("forgot", "forgotten"),
    "finds": ("found", "found"), "holds": ("held", "held"), "buys": ("bought", "bought"),
    "sells": ("sold", "sold"), "keeps": ("kept", "kept"), "loses": ("lost", "lost"),
    "brings": ("brought", "brought"), "leaves": ("left", "left"), "washes": ("washed", "washed"),
    "paints": ("painted", "painted"), "carries": ("carried", "carried"),
    "moves": ("moved", "moved"),
}

# what the corpus asks about, and the quiz never
# animal: its young
YOUNG = {
    "cow": "calf", "dog": "puppy", "cat": "kitten", "horse": "foal", "goat": "kid", "lion": "cub",
    "duck": "duckling", "goose": "gosling", "swan": "cygnet", "eagle": "eaglet", "owl": "owlet",
    "sheep": "lamb", "pig": "piglet", "frog": "tadpole", "deer": "fawn", "hen": "chick",
    "butterfly": "caterpillar", "kangaroo": "joey", "hare": "leveret", "eel": "elver",
    "fly": "maggot", "spider": "spiderling",
}
# thing: what it is mostly made of
MADE_OF = {
    "bread": "flour", "cheese": "milk", "paper": "wood", "window": "glass", "candle": "wax",
    "wine": "grapes", "cider": "apples", "tyre": "rubber", "brick": "clay", "jam": "fruit",
    "butter": "cream", "chocolate": "cocoa", "jeans": "cotton", "sweater": "wool",
    "shoe": "leather", "nail": "iron", "ketchup": "tomatoes", "omelette": "eggs", "beer": "barley",
    "sushi": "rice", "crisps": "potatoes", "tofu": "beans",
}
# country: its money
MONEY = {
    "Japan": "yen", "China": "yuan", "Poland": "zloty", "Sweden": "krona", "Norway": "krone",
    "Hungary": "forint", "Egypt": "pound", "Kenya": "shilling", "Ghana": "cedi",
    "Morocco": "dirham", "Tunisia": "dinar", "Zambia": "kwacha", "Angola": "kwanza",
    "Iran": "rial", "Nepal": "rupee", "Vietnam": "dong", "Thailand": "baht", "Qatar": "riyal",
    "Peru": "sol", "Chile": "peso", "Brazil": "real", "Canada": "dollar", "Italy": "euro",
    "Senegal": "franc",
}
# what somebody is known for: who
MAKERS = {
    "Hamlet": "Shakespeare", "Faust": "Goethe", "Emma": "Austen", "Don Quixote": "Cervantes",
    "the Iliad": "Homer", "Guernica": "Picasso", "the Mona Lisa": "Leonardo",
    "Sunflowers": "Van Gogh", "The Magic Flute": "Mozart", "Oliver Twist": "Dickens",
    "War and Peace": "Tolstoy", "the telephone": "Bell", "dynamite": "Nobel",
    "gravity": "Newton", "relativity": "Einstein", "evolution": "Darwin", "radium": "Curie",
    "penicillin": "Fleming", "the periodic table": "Mendeleev", "printing": "Gutenberg",
    "vaccination": "Jenner", "the diesel engine": "Diesel",
}
