"""What English verbs and nouns say about a person: named relations, and which hold one value.

A relation that is not named here is the verb's own word, with its preposition: `paint`, `go_to`.
"""

import re


def listed(text: str, by: str | None = None) -> list[str]:
    """The entries of a table that is written as text, separated by white space or `by`."""
    return text.split(by)


# "verb" or "verb preposition" -> relation.
VERBS = {
    **dict.fromkeys(
        listed("live in|live at|reside in|move to|relocate to|settle in|move into|base in", "|"),
        "lives_in",
    ),
    **dict.fromkeys(
        listed("work at|work for|start at|employ at|employ by|hire by|hire at|intern at", "|"),
        "works_at",
    ),
    "work as": "works_as",
    "work in": "works_in",
    **dict.fromkeys(listed("like|love|enjoy|adore|fancy", "|"), "likes"),
    **dict.fromkeys(listed("hate|dislike|detest|loathe|despise", "|"), "dislikes"),
    "prefer": "prefers",
    **dict.fromkeys(listed("have|own|get|adopt|possess|buy", "|"), "has"),
    "study at": "studies_at",
    "enrol at": "studies_at",
    "enroll at": "studies_at",
    "study": "studies",
    "major in": "studies",
    "graduate from": "graduated_from",
    "speak": "speaks",
    "play": "plays",
    "drive": "drives",
    "marry": "married_to",
    "marry to": "married_to",
    "engage to": "engaged_to",
    "bear in": "born_in",
    "bear on": "birthday",
    "come from": "from",
    "grow up in": "grew_up_in",
    "call": "name",
    "name": "name",
}
NOUNS = {
    **dict.fromkeys(listed("job occupation profession"), "works_as"),
    **dict.fromkeys(listed("employer company workplace"), "works_at"),
    **dict.fromkeys(listed("home city residence address"), "lives_in"),
    "wife": "married_to",
    "husband": "married_to",
    "spouse": "married_to",
    "date_of_birth": "birthday",
    "native_language": "speaks",
}
# What one can have at most one of at a time.
SINGLE = frozenset(
    listed(
        """lives_in works_at works_as birthday born_in age name married_to engaged_to status from
        phone email phone_number email_address"""
    )
)
OPPOSITE = {"likes": "dislikes", "dislikes": "likes"}
KIN = frozenset(
    listed(
        """sister brother mother mom mum dad father parent son daughter child kid wife husband
        spouse partner girlfriend boyfriend fiance fiancee friend cousin aunt uncle grandma
        grandpa grandmother grandfather grandson granddaughter niece nephew boss manager
        colleague coworker roommate flatmate neighbor neighbour dog cat puppy kitten pet horse
        rabbit parrot hamster teacher mentor coach doctor therapist baby twin stepson
        stepdaughter"""
    )
)
WORK = frozenset(
    listed(
        """nurse doctor teacher engineer lawyer chef cook baker writer author artist painter
        designer developer programmer scientist researcher professor student manager accountant
        pilot farmer barista waiter waitress driver mechanic plumber electrician carpenter
        architect dentist pharmacist therapist counselor counsellor psychologist veterinarian
        vet librarian journalist editor photographer musician actor actress dancer singer
        director producer analyst consultant salesperson cashier clerk secretary firefighter
        paramedic soldier translator tutor coach gardener florist tailor butcher"""
    )
)
ANTONYMS = {
    frozenset(pair.split("/"))
    for pair in listed(
        """married/single married/divorced single/engaged employed/unemployed happy/sad
        happy/unhappy open/closed hot/cold early/late vegetarian/meat healthy/sick healthy/ill
        always/never before/after alive/dead rich/poor easy/hard cheap/expensive won/lost
        passed/failed accepted/rejected start/stop started/stopped started/finished begin/end
        increase/decrease increased/decreased more/less best/worst first/last big/small
        large/small old/new old/young left/right morning/evening like/dislike love/hate
        likes/dislikes loves/hates loves/dislikes likes/hates loved/hated good/bad
        safe/dangerous able/unable possible/impossible with/without true/false yes/no on/off
        full/empty same/different pass/fail"""
    )
}
# Words in -ing that say how something is, not what somebody is doing.
QUALITIES = frozenset(
    listed(
        """amazing inspiring interesting exciting boring challenging rewarding comforting relaxing
        refreshing stunning touching fascinating disappointing surprising encouraging satisfying
        fulfilling exhausting tiring annoying embarrassing charming loving caring nothing something
        anything everything thought-provoking heartwarming breathtaking overwhelming calming
        soothing motivating empowering heartbreaking frustrating confusing outstanding willing"""
    )
)
# Said without "I" at the start of a message these are the speaker's: "Love the details!"
ATTITUDES = frozenset(listed("love like enjoy hate miss appreciate adore hope wish want need"))
STATUS = frozenset(listed("single married divorced engaged widowed separated pregnant retired"))
# After these verbs the object is something wanted, not something that is.
WISHES = frozenset(listed("want hope plan intend wish aim decide consider dream need think"))
# Verbs whose object is a thought or a courtesy, never a fact to keep.
EMPTY = frozenset(
    listed("think guess mean know see hear say tell bet agree wonder suppose thank let believe")
)
_FORMS = """
be:am is are was were been being|have:has had having|do:does did done doing
go:went gone goes|get:got gotten|make:made making|take:took taken|come:came
see:saw seen|know:knew known|give:gave given|find:found|think:thought|tell:told
become:became|leave:left|feel:felt|bring:brought|begin:began begun|keep:kept|hold:held
write:wrote written|stand:stood|hear:heard|meet:met|run:ran running|pay:paid|sit:sat
speak:spoke spoken|lead:led|grow:grew grown|lose:lost|fall:fell fallen|send:sent
build:built|draw:drew drawn|break:broke broken|spend:spent|drive:drove driven
buy:bought|wear:wore worn|choose:chose chosen|eat:ate eaten|drink:drank drunk
fly:flew flown|swim:swam swum swimming|sing:sang sung|win:won winning|teach:taught
catch:caught|sell:sold|sleep:slept|ride:rode ridden|rise:rose risen|bear:born bore
say:said|forget:forgot forgotten|fight:fought|hang:hung|throw:threw thrown
wake:woke woken|understand:understood|learn:learnt|dream:dreamt|light:lit|shoot:shot
steal:stole stolen|bake:baked baking|move:moved moving|like:liked|love:loved
hike:hiked hiking|bike:biked biking|use:used using|die:died dying
marry:married marries|study:studied studies studying|try:tried tries
carry:carried carries|visit:visited visiting|play:played plays playing
enjoy:enjoyed enjoys|read:reading|quit:quitting|put:putting|let:letting|set:setting
cut:cutting|stop:stopped stopping|plan:planned planning|volunteer:volunteered
create:created creating|change:changed changing|lie:lying lay|prefer:preferred prefers
hurt:hurting|cost:costs|own:owned owns owning|bear:borne|open:opened opens opening
happen:happened|listen:listened|call:called calls calling|sign:signed|paint:painted
train:trained|start:started starts|finish:finished|camp:camped camping
join:joined joins|hire:hired|name:named|base:based|engage:engaged|graduate:graduated
relocate:relocated relocating|settle:settled|reside:resides resided
"""
IRREGULAR = {
    form: lemma
    for entry in re.split(r"[|\n]", _FORMS.strip())
    for lemma, forms in [entry.split(":")]
    for form in forms.split()
}
LEMMAS = frozenset(IRREGULAR.values()) | frozenset(
    listed(
        """work live like love enjoy hate want need adopt attend organize organise cook help share
        explore discover paint watch walk talk call ask turn show look follow offer create
        consider appear serve remember expect stay report decide pull return explain hope
        develop carry receive agree support hit produce cover cause reach raise pass sign focus
        relate research apply improve experience celebrate travel practice practise participate
        perform express inspire encourage manage struggle realize realise believe value
        appreciate find collect design record post donate recommend suggest mention discuss
        describe invite accept provide include involve aim intend wish switch collaborate lose
        suffer recover own prefer dislike retire cancel postpone prepare grow bake drive
        exercise host launch publish complete win lift climb surf dance draw sew knit garden
        fish camp hike ski adore plan study teach train mentor coach work rent sell subscribe
        collect drink smoke"""
    )
)


def lemma(word: str) -> str:
    """The base form of a verb's form, by table and English spelling rules."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    if word in LEMMAS:
        return word
    for ending in ("ing", "ed"):
        if word.endswith(ending) and len(word) > len(ending) + 2:
            return _unsuffixed(word[: -len(ending)], ending)
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("sses", "shes", "ches", "xes", "zes")):
        return word[:-2]
    if word.endswith("s") and not word.endswith(("ss", "us", "is")) and len(word) > 3:
        return word[:-1]
    return word


def _unsuffixed(root: str, ending: str) -> str:
    if ending == "ed" and root.endswith("i"):
        return root[:-1] + "y"
    if root in LEMMAS:
        return root
    if root + "e" in LEMMAS:
        return root + "e"
    vowels = "aeiou"
    if len(root) > 2 and root[-1] == root[-2] and root[-1] not in "lsfz":
        return root[:-1]
    syllables = sum(
        c in vowels and (i == 0 or root[i - 1] not in vowels) for i, c in enumerate(root)
    )
    short = (
        syllables == 1
        and len(root) > 1
        and root[-1] not in vowels + "wxy"
        and root[-2] in vowels
        and (len(root) < 3 or root[-3] not in vowels)
    )
    # A short root that did not double its consonant lost an e: hoping, but hopping.
    if short or root.endswith(("v", "c", "u", "iz", "at", "as", "os", "is", "dg", "rg")):
        return root + "e"
    return root


def attribute(noun: str) -> str:
    """The relation that a possessed noun names: my job, my favorite color."""
    for american, british in (("favorite", "favourite"), ("color", "colour")):
        noun = noun.replace(american, british)
    return NOUNS.get(noun, noun)


def single(relation: str) -> bool:
    """Whether at most one value holds at a time."""
    return relation in SINGLE or relation.startswith(("favourite_", "current_"))


def third_person(word: str) -> str:
    """The form of a verb after he or she."""
    irregular = {"have": "has", "do": "does", "go": "goes", "be": "is"}
    if word in irregular:
        return irregular[word]
    if word.endswith(("s", "sh", "ch", "x", "z")):
        return word + "es"
    if word.endswith("y") and word[-2:-1] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"
