"""Ordinary English words, for tokenizer merges only.

Knows: common words and small-number word-problem vocabulary, most common first. No model is trained on
them; they only keep real text from falling apart into single bytes.
Refuses to know: meaning, grammar, and the apothecary's own words.
"""

from __future__ import annotations

COMMON_WORDS = tuple(
    """the of and to a in is that it for was on with as he be at by this had not are but from or have an
    they which one you were all her she there would their we him been has when who will no more if out so
    up said what its about than into them can only other time new some could these two may first then do
    any like my now over such our man me even most made after also did many off before must well back
    through years much where your way down should because long each just state those people too mr how
    little good world make very year still see own work men day get here old life both between being under
    three never know same last another while us might great go come since against right came take used
    himself few house use place during high without again home around small however found part school
    thought went say general once upon every left fact number does night until always away something
    put think water less far though almost room give hand enough took yet better best side per set next
    find want ask keep let begin seem help show hear play run move live believe bring happen write sit
    stand lose pay meet include continue learn change lead understand watch follow stop create speak read
    spend grow open walk win teach offer remember consider appear buy serve die send build stay fall cut
    reach kill raise pass sell decide return explain hope develop carry break receive agree support hit
    produce eat cover catch draw choose point area family percent half twice times each total week weeks
    month months days hours hour minutes minute money cost costs dollars dollar cents price pounds pound
    miles mile feet foot inches gallons gallon cups cup boxes box bags bag books book pages page students
    student children child friends friend brother sister mother father parents apples apple oranges eggs
    egg cookies cookie pizza cake candy flowers trees tree cars car bus train truck store market farm
    company job class team game games points score ball balls toys pencils pens shirts shoes dogs dog cats
    cat cows chickens fish birds animals pieces piece slices ounces gave gets got has had bought sold
    spent saved earned earns paid makes takes needs wants eats uses left remaining altogether combined
    together many much more less fewer than equal number average rate speed length width height weight
    age older younger old double triple third quarter fourth fifth dozen hundred thousand four five six
    seven eight nine ten eleven twelve twenty thirty forty fifty sixty seventy eighty ninety morning
    afternoon evening today yesterday tomorrow monday tuesday wednesday thursday friday saturday sunday
    table food drink milk juice bread meat lunch dinner breakfast white black red blue green yellow brown
    big large short tall question answer please review product service order delivery email phone name
    address computer system user data message example information line list value result function code
    file text word words sentence letter language english because therefore according difference amount
    added subtract multiply divide equals initially originally already started finished ended inside
    outside every everyone anything nothing himself herself itself themselves won't don't didn't isn't
    James John Mary Tom Sam Bob Alice Jane Mike Tim Mark Lisa Anna Emily Jack Josh Sarah Peter If How The
    In He She It They There What When Each After So For At On This That First Then Since Now He's""".split()
)
ENDINGS = tuple("s ed ing er ly 's ion tion al ment ness es en y able ful ive ity ous est".split())
