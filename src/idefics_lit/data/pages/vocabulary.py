"""The word lists of the pages; `words` holds out about a quarter of each list."""


def _split(text: str, separator: str | None = None) -> tuple[str, ...]:
    return tuple(text.split(separator))


_LISTS = {
    "first": """
        James Mary Robert Linda John Susan Michael Karen David Nancy William Betty Richard Helen Joseph Sandra Thomas
        Donna Charles Carol Daniel Ruth Paul Sharon Mark Laura George Anna Kenneth Emma Steven Alice Edward Julia
        Brian Grace Ronald Irene Kevin Martha Jason Judith Gary Rose Frank Diane Eric Ellen Peter Clara Harold Edith
        Walter Norma Carl Hazel Arthur Sylvia Roger Vera Albert Iris Henry Olga Ralph Nora Oscar Lena Victor Ada Felix
        Zoe Hugo Maya Ivan Tara Leon Yvonne Adele Agnes Alan Amos Andrew Arnold Audrey Bernard Bertha Bruno Cecil
        Claude Conrad Curtis Daisy Dean Dennis Dora Doris Dwight Edgar Edwin Eleanor Elmer Ernest Esther Ethel Eugene
        Fiona Floyd Fred Gail Gerald Gilbert Gladys Glen Gloria Harvey Heidi Herman Hilda Howard Ian Ida Ingrid Jack
        Jane Jerome Joan Joyce Keith Kurt Lester Lloyd Lois Louis Lydia Mabel Marvin Matilda Miriam Morris Naomi Neil
        Norman Opal Otto Pamela Percy Philip Rachel Raymond Regina Rita Roland Roy Russell Samuel Sheila Sidney Simon
        Stella Theodore Ursula Vernon Wanda Warren Wilma Winifred
    """,
    "last": """
        Smith Johnson Brown Jones Garcia Miller Davis Wilson Moore Taylor Anderson Jackson White Harris Martin
        Thompson Clark Lewis Walker Hall Young King Wright Scott Green Baker Adams Nelson Hill Campbell Mitchell
        Roberts Carter Phillips Evans Turner Parker Collins Edwards Stewart Morris Rogers Reed Cook Morgan Bell Murphy
        Bailey Cooper Richardson Cox Howard Ward Peterson Gray Watson Brooks Kelly Sanders Price Bennett Wood Barnes
        Ross Henderson Coleman Jenkins Perry Powell Long Patterson Hughes Flores Butler Foster Bryant Russell Griffin
        Hayes Fischer Novak Quinn Zeller Vance Ortiz Kowalski Lindqvist Abbott Barker Barrett Becker Benson Bishop
        Blake Bowman Brewer Briggs Burton Byrne Caldwell Chandler Chapman Crawford Curry Dalton Dawson Drake Duncan
        Eaton Ferguson Fletcher Fowler Gallagher Gibson Goodwin Hanson Harding Higgins Hopkins Ingram Jarvis Keller
        Lambert Larson Lowell Mason Maxwell Norton Osborne Palmer Pearson Quigley Ramsey Rhodes Sawyer Shelton Stone
        Tanner Tucker Underwood Vaughn Wallace Whitaker York
    """,
    "city": """
        Boston Chicago Denver Austin Seattle Portland Houston Dallas Phoenix Detroit Memphis Atlanta Miami Tampa
        Orlando Cleveland Columbus Omaha Tulsa Oakland Fresno Tucson Buffalo Newark Raleigh Richmond Norfolk Lincoln
        Madison Boise Reno Spokane Tacoma Durham Toledo Dayton Akron Albany Hartford Trenton Dover Helena Salem Eugene
        Laredo Lubbock Mobile Savannah Augusta Macon London Paris Berlin Madrid Rome Vienna Oslo Lisbon Dublin Geneva
        Zurich Prague Warsaw Athens Cairo Tokyo Osaka Lima Quito Bogota Toronto Ottawa Calgary Sydney Perth Amherst
        Bangor Basel Bergen Bristol Brussels Cardiff Cologne Concord Cork Delhi Dresden Erie Florence Galway Genoa
        Ghent Glasgow Hamburg Havana Jakarta Kyoto Leeds Leipzig Lyon Malmo Manila Milan Monterey Munich Nairobi
        Nantes Naples Porto Provo Riga Santiago Seville Stockton Turin Utrecht Valencia Wichita Yonkers
    """,
    "state": """
        Texas Ohio Iowa Maine Utah Nevada Oregon Kansas Florida Georgia Virginia Michigan Indiana Illinois
        Colorado Montana Idaho Vermont Alaska Hawaii Delaware Kentucky Missouri Nebraska Wyoming Arizona
        California Louisiana Maryland Minnesota Mississippi Oklahoma Pennsylvania Tennessee Wisconsin
    """,
    "country": """
        USA Canada Mexico France Germany Spain Italy Norway Sweden Poland Greece Turkey Egypt Kenya Brazil Chile
        Peru Japan China India Austria Ireland Portugal Denmark Finland Belgium Croatia Hungary Iceland Morocco
        Nepal Thailand Vietnam Colombia Ecuador Uruguay Jordan Tunisia Ghana Estonia Latvia
    """,
    "item": """
        Lamp Chair Desk Table Stapler Pencil Notebook Printer Monitor Keyboard Mouse Cable Battery Charger Folder
        Binder Marker Eraser Ruler Scissors Paper Envelope Stamp Clock Phone Radio Camera Speaker Router Switch Hammer
        Wrench Drill Screws Nails Paint Brush Ladder Bucket Mop Gloves Helmet Boots Jacket Towel Soap Bottle Cup Plate
        Spoon Kettle Heater Fan Filter Valve Pump Motor Belt Gear Bolt Washer Spring Sensor Tape Glue Rope Chain Hook
        Hinge Lock Almanac Apron Basket Bench Blanket Broom Cabinet Calendar Candle Carpet Compass Cushion Dictionary
        Easel Funnel Goggles Jar Lantern Mirror Mug Needle Padlock Pillow Pliers Ribbon Rug Sandpaper Saucepan Shelf
        Shovel Sponge Stool Telescope Thermos Tripod Tweezers Umbrella Vase Wallet Whistle Wrapper Yarn Zipper
    """,
    "company": """
        Acme Global United National Pacific Atlantic Summit Pioneer Sterling Crown Eagle Falcon Phoenix Delta Omega
        Alpha Nova Apex Vertex Zenith Northern Southern Western Eastern Central Premier Quality Superior Modern
        Classic Liberty Heritage Frontier Horizon Coastal Harbor River Valley Mountain Forest Granite Copper Silver
        Golden Diamond Crystal Blue Red Allied Amber Anchor Arctic Aspen Aurora Beacon Birch Boulder Bridge Canyon
        Cardinal Century Cobalt Comet Compass Dynamic Echo Emerald Evergreen Forge Galaxy Garnet Glacier Gulf Hudson
        Imperial Jade Juniper Keystone Lighthouse Lunar Magnolia Meridian Metro Monarch Noble Oasis Orchid Pearl
        Prairie Quartz Raven Regal Sapphire Sierra Solar Spectrum Tempo Titan Trident Union Vista Willow
    """,
    "street": """
        Main Oak Pine Maple Cedar Elm Washington Lake Hill Park Walnut Spring North River Church Market Center Union
        Prospect Chestnut Franklin Highland Mill Water Spruce Jefferson Lincoln Sunset Railroad Valley Abbey Aspen
        Birch Bridge Canal Castle Clay College Division Dover Forest Garden Grand Grove Hickory Juniper King Laurel
        Linden Magnolia Meadow Monroe Orchard Poplar Queen Ridge School Summit Tower Vine Willow
    """,
    "department": """
        Sales Marketing Finance Research Legal Shipping Accounting Support Production Engineering Purchasing Security
        Planning Operations Training Quality Design Logistics Payroll Customs Catering Maintenance Publishing
        Procurement Archives Laboratory Dispatch Insurance Budgeting Compliance Editorial Fleet Forestry Housing
        Irrigation Kitchen Licensing Nursing Packaging Parking Patents Plumbing Radiology Recruiting Safety Surgery
        Translation Treasury
    """,
    "position": """
        Manager Director Engineer Analyst Clerk Secretary Chemist Auditor Buyer Editor Officer Supervisor Technician
        Consultant Assistant Accountant Inspector Librarian Nurse Surveyor Cashier Trainer Architect Driver Porter
        Registrar Broker Carpenter Curator Dentist Dispatcher Electrician Estimator Foreman Geologist Glazier
        Machinist Mechanic Operator Painter Pharmacist Plumber Receptionist Scientist Translator Welder
    """,
    "subject": """
        Budget Meeting Report Project Schedule Contract Review Safety Travel Payment Delivery Policy Survey Inventory
        Equipment Staff Product Market Annual Monthly Weekly Final Draft Updated Customer Office Storage Lease Audit
        Warranty Proposal Access Annex Bonus Building Catalog Committee Conference Data Exhibit Expense Factory
        Freight Harvest Holiday Insurance Interview Journal Laboratory License Machine Parking Pension Permit Pricing
        Quality Recall Repair Research Salary Sample Seminar Strategy Tariff Training Tuition Visitor Volunteer
        Warehouse
    """,
    "payment": """
        Cash Check Visa Wire Card Transfer Invoice Mastercard Voucher Debit Credit Giro Amex Cheque Deposit Coupon
        Barter Coins Crypto Discover Escrow Loan Mandate Paypal Remittance Sofort Token Zelle
    """,
    "shipping": """
        Ground Air Express Freight Courier Overnight Rail Sea Pickup Standard Truck Barge Parcel Post Van Tanker Mail
        Priority Airmail Bicycle Canal Carrier Drone Ferry Helicopter Messenger Ocean Pipeline Railway Registered
        Steamer Tram
    """,
    "color": """
        Red Blue Green Black White Yellow Brown Gray Orange Purple Silver Gold Pink Beige Navy Teal Maroon Ivory
        Violet Turquoise Olive Amber Aqua Bronze Copper Coral Cream Crimson Cyan Indigo Lavender Lime Magenta Mint
        Peach Plum Rust Scarlet Tan
    """,
    "status": """
        Open Closed Pending Approved Rejected Paid Unpaid Active Expired Draft Final Shipped Accepted Cancelled
        Complete Delayed Returned Verified Waiting Suspended Archived Assigned Billed Blocked Confirmed Deferred
        Disputed Filed Granted Overdue Received Renewed Resolved Sealed Sent Signed Void
    """,
}
WORD_LISTS = {kind: _split(words) for kind, words in _LISTS.items()}

STREET_FORMS = _split("Street Avenue Road Lane Drive Court Blvd Way Place Square Terrace")
COMPANY_FORMS = _split("""
    Inc Ltd Corp LLC Co Group Labs Foods Tools Motors Press Bank Systems Supply Trading Energy Medical
    Textiles Partners Brothers Bakery Pharmacy
""")
MONTHS = _split("January February March April May June July August September October November December")
HONORIFICS = _split("Mr. Mrs. Dr. Ms.")

# Syllables of invented words, frequent parts several times. Only a word's first syllable may have no onset.
ONSETS = _split("""
    b c d f g h j k l m n p r s t v w z b c d f g h l m n p r s t w bl br ch cl cr dr fl fr gl gr kn kr ph pl pr qu sc
    sh shr sk sl sm sn sp spr st str sw th thr tr tw wh wr y
""")
VOWELS = _split("a e i o u a e i o a e i o u y ai ar au ay ea ee ei er ew ey ia ie io oa oi oo or ou ow ue ur")
RHYMES = ("",) * 24 + _split("""
    b by ch ck d ff ft g k l le ll ley lt ly m man mp n nd ng nk ns nt p r rd re rk rn rs rt s sh ss st t tch ter th ton
    ts tt x
""")

FORM_TITLES = _split(
    "Application Form|Registration|Purchase Order|Order Form|Statement|Memorandum|Request Form|Work Order|Certificate|"
    "Notice|Agreement|Contract|Summary|Warranty|Voucher|Membership|Claim Form|Inspection|Personnel Record|Quotation|"
    "Delivery Note|Travel Request|Test Report|Enrollment|Permit|Survey|Case Record|Change Order|Credit Memo",
    "|",
)

TABLE_TITLES = {
    "thing": _split("Price List|Stock Report|Inventory|Catalog|Delivery List|Order List|Warehouse Report", "|"),
    "person": _split("Staff List|Directory|Personnel|Duty Roster|Team Overview|Members|Employee Register", "|"),
    "place": _split("Sales Summary|Branches|Regional Report|Survey Results|Statistics|Annual Report|Table 1", "|"),
}

CARD_KINDS = _split(
    "Identity Card|Library Card|Student Card|Staff Pass|Visitor Pass|Member Card|Driver License|Health Card|Press Card|"
    "Travel Pass|Club Card|Security Badge",
    "|",
)
